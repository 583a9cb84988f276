"""DeepSpeed's checkpoints: ZeRO 0 to 3, pipelines, universal."""
