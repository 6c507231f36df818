"""Experiments of the papers on IPO, RTO, DR-PO and RLP, repeated with the code of this project."""
