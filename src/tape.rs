//! Reverse-mode tape over candle tensors.
