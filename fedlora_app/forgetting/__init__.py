"""A finished run without one of its clients, made of the updates that its server has kept.

Input: a run directory with ``federated.keep_uploads``, of which nothing is changed. From the global
adapter of round 0 every round is aggregated again, with the run's own rule, weights and server
optimizer, but without the client's updates. Output: a run directory beside it that every command
reads as it reads others.

An approximation of the run that would have been without the client: the others' updates are those
that they computed from global adapters with its share in them. FedEraser (Liu et al. 2021,
https://arxiv.org/abs/2012.13891) begins with the same replay and has the other clients calibrate
each update by some more training, for which they must all be there; here nobody need be.
"""

from fedlora_app.foundation.face import offer

__getattr__, __all__ = offer(
    __name__,
    {
        "configuration": ["configure_without", "default_name"],
        "forgetting": ["APPROXIMATION", "Forgetting"],
        "replay": ["ForgettingError"],
    },
)
