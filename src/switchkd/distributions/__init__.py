"""Pure functions of log-probabilities: divergences, addressed noise, shaping and draws. Nothing here knows a model."""
