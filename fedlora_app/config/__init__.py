"""The experiment: its settings, how they are read, and what a round consists of."""

from fedlora_app.foundation.face import offer

__getattr__, __all__ = offer(
    __name__,
    {
        "loading": ["load_config", "parse_config"],
        "rounds": ["BOTH", "Phase", "RoundPlan", "plan_round"],
        "schema": ["GLOBAL", "LOCAL", "ClientConfig", "Config", "ConfigError"],
    },
)
