"""What travels between server and clients, how, and what the server makes of it."""

from fedlora_app.foundation.face import offer

__getattr__, __all__ = offer(
    __name__,
    {
        "aggregation_error": ["ProductSketch"],
        "rules": ["RULES", "AggregationRule", "build_rule"],
        "weighted_mean": ["RejectedUpdateError", "WeightedMean"],
    },
)
