"""What config files import to state their claims (`experiments.spec.claims`)."""

from __future__ import annotations

from experiments.spec.claims import Claim, Missing, Results, claim

__all__ = ["Claim", "Missing", "Results", "claim"]
