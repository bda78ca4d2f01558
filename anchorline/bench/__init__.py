"""The verb ``bench``: how fast models run here, stage by stage, and how much memory they take."""
