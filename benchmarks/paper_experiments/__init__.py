"""The experiments of the Faster R-CNN paper (TPAMI version, section 4.1) on other data: ``../paper.py``."""
