from __future__ import annotations

import pytest

from fedlora_app.config.schema import GLOBAL, LOCAL, AdaptersConfig
from fedlora_app.evaluation.answering import Answering

BOTH = (GLOBAL, LOCAL)


@pytest.mark.parametrize(
    ("active", "label"),
    [((), "base"), ((GLOBAL,), GLOBAL), ((LOCAL,), "local:ann"), (BOTH, "global+local:ann")],
)
def test_a_client_answers_with_what_its_mode_has(active, label):
    own = Answering.own(active, "ann", 0.5)
    assert (own.adapters, own.label, own.scale) == (active, label, 0.5)


def test_a_gate_weighs_a_local_adapter_beside_the_global_one_only():
    gate, none = AdaptersConfig(), AdaptersConfig(gate="none")
    assert Answering.own(BOTH, "ann").has_gate(gate)
    assert not Answering.own(BOTH, "ann").has_gate(none)
    assert not Answering.own((LOCAL,), "ann").has_gate(gate)
    assert not Answering.own((GLOBAL,), "ann").has_gate(gate)
