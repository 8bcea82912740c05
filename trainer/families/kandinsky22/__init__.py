"""Kandinsky 2.2 (Razzhigaev et al. 2023, arXiv:2310.03502): a prior from text to a CLIP picture embedding, and a
decoder from the embedding to pixels. They are trained apart, as two families, and draw together.
"""
