"""Kinds of layers besides linear layers, convolutions and embeddings; one small file a family."""
