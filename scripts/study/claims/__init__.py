"""The claims of the study, in the order of its page. A new one is a file, its template, and a line here."""

from __future__ import annotations

from scripts.study.claims import claim_1, claim_2, claim_3, claim_4, on_curve

CLAIMS = (claim_1.CLAIM, claim_2.CLAIM, claim_3.CLAIM, claim_4.CLAIM, on_curve.CLAIM)
