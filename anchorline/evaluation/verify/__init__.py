"""Proof that the numbers held: one artefact against another, stage by stage and detection by detection."""
