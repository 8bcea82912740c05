"""An autoregressive model of pixels with a frequency prior and a transformer that reads text; see model.py."""
