"""Quantization parameters: read from a model, kept in the manifest, judged.

`found` is what a reader says of one quantized tensor; `weights` and `modules` are the readers;
`recording` stores the values; `parameters` is how the manifest has them; `findings` and
`saturation` say which are suspect. Only those that look at a model need torch.
"""
