"""What a curious server can tell from what a run's clients have sent it.

Input: a run directory with the updates that its server has kept, and the clients' data, which the
attacks are judged by and never see. Output: ``attack.json``.
"""
