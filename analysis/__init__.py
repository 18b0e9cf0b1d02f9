"""The studies: functions over `dpo.results` frames, and beside each the notebook that shows what they give."""
