"""From somebody's data set to per-client Alpaca files, split without near-duplicates."""

from fedlora_app.foundation.face import offer

__getattr__, __all__ = offer(
    __name__,
    {
        "importer": ["import_data"],
        "rows": ["ImportSettings"],
    },
)
