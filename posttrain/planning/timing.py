"""Times a recipe's forward and backward passes and DeepSpeed's engines on this machine, for plan.py --gpu=here."""

import multiprocessing
import os
import socket
import time
import traceback
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import numpy as np
import torch
from torch import distributed as dist

from posttrain.common import terminal
from posttrain.common.errors import is_mistake
from posttrain.data.packing import MicroBatch
from posttrain.engine.build import build_engine, build_reference
from posttrain.engine.ds_config import read_ds_config
from posttrain.engine.start import current_device, start_distributed
from posttrain.engine.update import free_engine
from posttrain.model.policy import Policy, checkpoint_activations, fastest_policy
from posttrain.operators import attention, layers
from posttrain.parallel import watchdog
from posttrain.planning.activations import model_of, with_layers
from posttrain.planning.planner import MANY, Planner, Seconds
from posttrain.planning.work import Work

WHOLE = 500e6  # parameters; a model with more is not timed whole, but with few layers
FEW = 2  # layers of such a model
ENOUGH_ON_CPU = 4096  # tokens of a micro-batch that take long enough to be timed; on a GPU MANY
REPEATS = 3
LITTLE = 8  # tokens of an answer; a micro-batch of one such example takes as long as an empty one would


def time_here(planner: Planner, modes, ds_configs) -> None:
    """Set the planner's `seconds` by timing on this machine; all ranks work at once, since they share caches, memory and links.

    `modes` are ways of checkpointing activations, `ds_configs` paths. Raises ValueError where there are fewer GPUs than ranks.
    """
    if planner.on_gpu and planner.ranks > torch.cuda.device_count():
        raise ValueError(f"--gpu=here times this machine, which has {torch.cuda.device_count()} GPUs: --gpus={planner.ranks} is more")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    with ProcessPoolExecutor(planner.ranks, multiprocessing.get_context("spawn")) as pool:
        ranks = [pool.submit(_worker, planner, modes, ds_configs, rank, port) for rank in range(planner.ranks)]
        try:
            planner.seconds = ranks[0].result()
        except BrokenProcessPool:
            raise ValueError(
                "timing on this machine failed. If nothing above says why, its memory was not enough for a rank, which the system then "
                "kills; without --gpu=here nothing is timed"
            ) from None


def _worker(*arguments) -> Seconds:
    """Run _time_rank; an error is printed, and ends this process and so all others of the pool."""
    try:
        return _time_rank(*arguments)
    except Exception as error:  # any: its process ends, and with it those of the other ranks, which would wait for it
        mistake = is_mistake(error)
        terminal.say_error(f"error: {error}" if mistake else traceback.format_exc())
        if not mistake:
            terminal.show_noise()
        os._exit(1)


def _time_rank(planner: Planner, modes, ds_configs, rank: int, port: str) -> Seconds:
    """Be one rank of those that time: join the others, and return the seconds, the same on all. All ranks."""
    here = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": planner.ranks, "LOCAL_SIZE": planner.ranks}
    os.environ |= {name: str(value) for name, value in here.items()} | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    terminal.keep_noise()
    device = start_distributed()
    batch = planner.work.batch_of(_typical_micro_batch(planner)).to(device)
    depth = planner.config.num_hidden_layers
    few, more = (depth, depth) if planner.count <= WHOLE else (1, min(FEW, depth))
    token = {}
    for mode in (*modes, *["reference"] * planner.reference):
        seconds = _pass_seconds(planner, more, batch, mode, device)
        if few < more:  # models of `few` and of `more` layers differ by a layer's time; what else they take is the head's
            layer = (seconds - _pass_seconds(planner, few, batch, mode, device)) / (more - few)
            seconds += (depth - more) * max(layer, 0.0)
        token[mode] = seconds / batch.input_ids.shape[1]
    reference = token.pop("reference", 0.0)
    token = {mode: seconds + reference for mode, seconds in token.items()}
    between = {name: _engine_seconds(planner, more, name, device) for name in ds_configs}
    if planner.reference:
        beside = _gather_seconds(planner, more, device)
        between = {name: (seconds + beside, update) for name, (seconds, update) in between.items()}
    dist.barrier()
    watchdog.close()  # from here on a rank may leave before the others
    dist.barrier()
    dist.destroy_process_group()
    return Seconds(token, *({name: seconds[kind] for name, seconds in between.items()} for kind in (0, 1)))


def _typical_micro_batch(planner: Planner) -> np.ndarray:
    """Return the examples of the micro-batch whose tokens attend to about as many others as the mean token does."""
    lengths, attended = planner.work.lengths, planner.work.attended()
    enough = MANY if planner.on_gpu else ENOUGH_ON_CPU
    found = [one[: max(1, int(np.searchsorted(lengths[one].cumsum(), enough)))] for one in planner.micro_batches()]
    mean = attended.sum() / lengths.sum()
    return min(found, key=lambda one: abs(attended[one].sum() / lengths[one].sum() - mean))


def _random_policy(planner: Planner, depth: int, mode: str, device: torch.device) -> Policy:
    """Build a policy of `depth` layers with random weights, with the kernels that a run would take."""
    config = with_layers(planner.counted, list(range(depth)))
    with device:
        model = model_of(config, planner.dtype).train()
    name, _ = attention.choose(planner.recipe.kernels, device, planner.dtype, 0.0, config.get_text_config())
    layers.choose(model, planner.recipe.kernels, compiled=False, device=device)
    policy = fastest_policy(model, name)
    policy.head.choose(planner.recipe.kernels, device, planner.dtype.itemsize * planner.count)
    if mode != "reference":
        checkpoint_activations(model, mode)
    return policy


def _pass_seconds(planner: Planner, depth: int, batch: MicroBatch, mode: str, device: torch.device) -> float:
    """Return the seconds of forward and backward with a way of checkpointing activations, or of forward for mode "reference". All ranks."""
    policy = _random_policy(planner, depth, mode, device)
    if mode != "reference":
        return _median_seconds(lambda: policy(batch).sum().backward())
    with torch.no_grad():
        return _median_seconds(lambda: policy(batch))


def _smallest_batch(work: Work) -> MicroBatch:
    """Build a micro-batch of next to no tokens, to time what a micro-batch takes beside them."""
    one, answers = np.full(1, LITTLE), work.answers.shape[1]
    return Work(1, one * (answers - 1), np.full((1, answers), LITTLE), one, work.shared).batch_of([0])


def _engine_seconds(planner: Planner, depth: int, ds_config: str, device: torch.device) -> tuple[float, float]:
    """Return the seconds of a micro-batch beside its tokens, and of the optimizer step, timed in a DeepSpeed engine. All ranks.

    Both are scaled up from the timed layers to the whole model.
    """
    little = _smallest_batch(planner.work).to(device)
    recipe = planner.recipe.model_copy(update={"ds_config": ds_config, "activation_checkpointing": "none", "compile": False})
    policy = _random_policy(planner, depth, "none", device)
    times = _size_ratio(planner, policy)
    alone = _median_seconds(lambda: policy(little).sum().backward())
    policy.zero_grad()
    engine = build_engine(policy, recipe, read_ds_config(ds_config))

    def step(micro_batches: int) -> None:
        for left in reversed(range(micro_batches)):
            engine.backward(engine(little).sum(), is_last=not left)
        engine.update()

    one, two = _median_seconds(lambda: step(1)), _median_seconds(lambda: step(2))
    engine.free()
    return times * max(0.0, two - one - alone), times * max(0.0, 2 * one - two)


def _size_ratio(planner: Planner, policy: Policy) -> float:
    """Return the planned model's number of parameters divided by that of `policy`."""
    return planner.count / sum(parameter.numel() for parameter in policy.parameters())


def _gather_seconds(planner: Planner, depth: int, device: torch.device) -> float:
    """Return the seconds that gathering the reference's weights takes for a micro-batch, scaled up to the whole model. All ranks."""
    little, policy = _smallest_batch(planner.work).to(device), _random_policy(planner, depth, "reference", device)
    times = _size_ratio(planner, policy)
    with torch.no_grad():
        alone = _median_seconds(lambda: policy(little))
        engine = build_reference(policy, planner.recipe)
        seconds = _median_seconds(lambda: engine(little))
    free_engine(engine)
    return times * max(0.0, seconds - alone)


def _median_seconds(action) -> float:
    """Return the median seconds that `action` takes, of the rank that takes the longest. All ranks."""
    times = []
    for _ in range(REPEATS + 1):
        dist.barrier()
        started = time.perf_counter()
        action()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    longest = torch.tensor(float(np.median(times[1:])), device=current_device())
    dist.all_reduce(longest, dist.ReduceOp.MAX)
    return longest.item()
