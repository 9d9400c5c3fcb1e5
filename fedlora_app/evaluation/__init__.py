"""Whether it works: question sets, their scoring, and what the scores can and cannot say."""
