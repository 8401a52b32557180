"""Launch knobs measured on this machine: `tuner` finds, `store` keeps and `lookup` serves them (docs/tuning.md)."""
