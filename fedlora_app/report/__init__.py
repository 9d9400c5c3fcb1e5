"""Looking at runs: their histories as tables, the plots, and the page that tells what came out."""

from fedlora_app.foundation.face import offer

__getattr__, __all__ = offer(__name__, {"page": ["write_comparison", "write_report"]})
