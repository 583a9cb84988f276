"""Other systems' checkpoints, in and out.

An importer presents a foreign checkpoint as the logical tensors that ckptsvc would have saved (`logical.Logical`):
names, regions, and where their bytes lie; nothing is copied. An exporter lays out the files of another format
(`outputs.Output`): which bytes are fixed, and which region of which tensor goes where. Between them stands the planner
of `geometry`.

No module here imports torch.
"""
