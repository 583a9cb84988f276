"""A model of Megatron-Core on one CPU process, for test_megatron_loads: loads checkpoints, and says what differs.

    megatron_job.py CLASSIC DIST TRUTH

CLASSIC is a file of tp=1, pp=1, DIST a `torch_dist` folder, TRUTH what both must hold. Prints a JSON object: how many
tensors differ after each was loaded into a model and its optimizer, and where the distributed optimizer's buffers have
the parameters, for several sizes of buckets.
"""

import json
import socket
import sys
import warnings
from argparse import Namespace
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

warnings.filterwarnings("ignore")

from megatron.core import dist_checkpointing, parallel_state  # noqa: E402
from megatron.core.distributed import DistributedDataParallelConfig  # noqa: E402
from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBuffer  # noqa: E402
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec  # noqa: E402
from megatron.core.models.gpt.gpt_model import GPTModel  # noqa: E402
from megatron.core.optimizer import OptimizerConfig, _get_param_groups  # noqa: E402
from megatron.core.optimizer.optimizer import FP32Optimizer  # noqa: E402
from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402

SLOTS = ("exp_avg", "exp_avg_sq", "step")
SIZES = (0, 1000, 3000)
OPTIMIZER = OptimizerConfig(optimizer="adam", lr=0.01, weight_decay=0.1)


def on_cpu() -> None:
    """Megatron-Core asks for CUDA devices where the CPU does as well."""
    torch.cuda.current_device = lambda: "cpu"  # type: ignore[assignment,return-value]
    made = torch.tensor
    torch.tensor = lambda *args, device=None, **kwargs: made(*args, **kwargs)


def new_model() -> GPTModel:
    config = TransformerConfig(
        num_layers=4, hidden_size=20, num_attention_heads=4, ffn_hidden_size=36, use_cpu_initialization=True,
        bias_dropout_fusion=False, masked_softmax_fusion=False, bias_activation_fusion=False,
        gradient_accumulation_fusion=False,
    )  # fmt: skip
    spec = get_gpt_layer_local_spec(normalization="LayerNorm")
    return GPTModel(config, spec, vocab_size=68, max_sequence_length=11, share_embeddings_and_output_weights=True)


def new_optimizer(model: GPTModel) -> torch.optim.Optimizer:
    return torch.optim.AdamW(_get_param_groups([model], OPTIMIZER, None), lr=0.01, weight_decay=0.1)


def differing(model: GPTModel, optimizer: torch.optim.Optimizer, truth: Any) -> int:
    bad = 0
    for name, parameter in model.named_parameters():
        expected, state = truth["params"][name], optimizer.state[parameter]
        bad += not torch.equal(parameter, expected["param"])
        bad += sum(not torch.equal(state[slot].float(), torch.as_tensor(expected[slot])) for slot in SLOTS)
    return bad


def load_classic(file: str, truth: Any) -> int:
    model = new_model()
    optimizer = new_optimizer(model)
    root = torch.load(file, weights_only=True)
    model.load_state_dict(root["model"], strict=True)
    optimizer.load_state_dict(root["optimizer"])
    return differing(model, optimizer, truth)


def load_dist(folder: str, truth: Any) -> int:
    model = new_model()
    inner = new_optimizer(model)

    def start(optimizer: torch.optim.Optimizer, _: Any = None) -> None:
        for group in optimizer.param_groups:
            for p in group["params"]:
                zeros = {slot: torch.zeros_like(p) for slot in SLOTS[:2]}
                optimizer.state[p] = {"step": torch.tensor(0.0), **zeros}

    optimizer = FP32Optimizer(inner, OPTIMIZER, start)
    sharded = model.sharded_state_dict()
    wanted = {"model": sharded, "optimizer": optimizer.sharded_state_dict(sharded, is_loading=True)}
    loaded = dist_checkpointing.load(wanted, folder)
    model.load_state_dict(loaded["model"], strict=True)
    optimizer.load_state_dict(loaded["optimizer"])
    return differing(model, inner, truth)


def buffer(size: int | None, *, shared: bool) -> tuple[int, list[list[Any]]]:
    """Elements of a buffer; [name, elements, first element, bucket] of every parameter, in the order of the model."""
    model = new_model()
    names = {p: name for name, p in model.named_parameters()}
    if shared:
        model.embedding.word_embeddings.weight.shared_embedding = True
    config = DistributedDataParallelConfig(use_distributed_optimizer=True)
    groups = SimpleNamespace(tp=dist.group.WORLD, dp_cp=dist.group.WORLD)
    numbers = list(range(len(names)))
    float32 = torch.float32
    made = _ParamAndGradBuffer(
        config, float32, float32, list(names), dist.group.WORLD, size, names, 1.0, numbers, False, groups
    )
    starts = [first for first, _ in made.bucket_indices]
    places = made.param_index_map
    return made.numel_unpadded, [
        [name, p.numel(), places[p][0] - starts[places[p][2]], places[p][2]] for p, name in names.items()
    ]


def main(classic: str, folder: str, truth_file: str) -> None:
    on_cpu()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=1)
    parallel_state.initialize_model_parallel(1, 1)
    torch.serialization.add_safe_globals([Namespace])
    truth = torch.load(truth_file, weights_only=True)
    found = {
        "classic": load_classic(classic, truth),
        "dist": load_dist(folder, truth),
        "buffers": [[size, alone, *buffer(size or None, shared=alone)] for size in SIZES for alone in (False, True)],
    }
    dist.destroy_process_group()
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
