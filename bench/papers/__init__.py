"""Experiments of the papers behind IPO, RTO, DR-PO and RLP, repeated with the code of this project."""
