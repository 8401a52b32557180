"""Vector quantisation: the code whose codebook entry is nearest by squared L2 distance (MaskGIT-VQGAN)."""
