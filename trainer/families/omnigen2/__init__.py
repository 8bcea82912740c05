"""OmniGen2 (Wu et al. 2025, arXiv:2506.18871): a rectified-flow transformer that reads an instruction's states in
Qwen2.5-VL and the latents of reference pictures. Neither diffusers nor transformers has it.
"""
