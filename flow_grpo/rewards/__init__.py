"""Rewards: functions of images in [0, 1], prompts and metadata. `registry.py` lists them; one file per scorer.

`checks.py` says what is wrong with a configuration's, without torch; `building.py` loads them.
"""
