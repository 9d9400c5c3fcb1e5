"""The demo that ships with the project: a civic help desk in two cities.

``civic`` holds the language (topics, phrasings, possible answers), ``data`` writes
the clients' files and ``base_model`` trains the small model that the demo starts from.
"""
