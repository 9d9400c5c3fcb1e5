from __future__ import annotations

import math

from fedlora_app.federation.product_errors import ProductErrors


def test_errors_are_relative_by_module_by_kind_and_in_all():
    found = ProductErrors()
    found.note("layers.0.q_proj", 3.0, 6.0)
    found.note("layers.1.q_proj", 4.0, 8.0)
    found.note("layers.0.up_proj", 0.0, 0.0)
    found.note("layers.1.up_proj", 1.0, 0.0)
    assert found.by_module == {
        "layers.0.q_proj": 0.5,
        "layers.1.q_proj": 0.5,
        "layers.0.up_proj": 0.0,
        "layers.1.up_proj": None,
    }
    assert found.by_group == {"q_proj": 5 / 10, "up_proj": None}
    assert found.total == math.sqrt(26) / 10
    assert ProductErrors().total is None and ProductErrors().by_group == {}
