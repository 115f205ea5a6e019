"""train.main on CUDA tensors that exist nowhere: a machine without a GPU shows where devices mix
and where the CPU waits for the GPU. Whatever is read from a tensor is 3, or True."""
import traceback
from collections import Counter

import pytest
import torch
import torch.nn as nn
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from conftest import ROOT
from test_checkpoint import TEXT, VISION

aten = torch.ops.aten


class Waits(TorchDispatchMode):
    """Has in `lines` which lines of the project had the CPU wait for the GPU."""
    def __init__(self):
        super().__init__()
        self.lines = []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        options = options or {}
        tensors = [x for x in arguments if isinstance(x, torch.Tensor)]
        if function in (aten.item.default, aten._local_scalar_dense.default):
            self.note(tensors[0].is_cuda)
            return True if tensors[0].dtype == torch.bool else 3
        try:
            result = function(*arguments, **options)
        except DynamicOutputShapeException:  # an index by a mask, say, which picks one element here
            self.note(tensors[0].is_cuda)
            return tensors[0].new_zeros(1)
        if function.overloadpacket in (aten.to, aten._to_copy, aten.copy_):
            queued = result.is_cuda and (options.get("non_blocking") or arguments[-1] is True)
            self.note(tensors[-1].is_cuda != result.is_cuda and not queued)
        return result

    def note(self, waits):
        if waits:
            places = [f"{frame.filename}:{frame.lineno}" for frame in traceback.extract_stack()]
            self.lines.append([place for place in places if place.startswith(f"{ROOT}/")
                               and __file__ not in place][-1])


def to(module, device):
    """nn.Module.to, which can't exchange fake parameters in place."""
    for part in module.modules():
        for name, p in part.named_parameters(recurse=False):
            part._parameters[name] = nn.Parameter(p.detach().to(device), p.requires_grad)
        for name, buffer in part.named_buffers(recurse=False):
            part._buffers[name] = buffer.to(device)
    return module


@torch.no_grad()
def backward(loss):
    """Tensor.backward, node by node, as PyTorch's engine asks the driver for its streams."""
    nodes, edges = [loss.grad_fn], Counter()
    for node in nodes:  # which grow
        children = [child for child, _ in node.next_functions]
        nodes += {child for child in children if child and child not in edges}
        edges.update(children)
    gradients, ready = {(loss.grad_fn, 0): torch.ones_like(loss)}, [loss.grad_fn]
    for node in ready:  # which grow
        outputs = node(*(gradients.pop((node, i), None) for i in range(len(node._input_metadata))))
        outputs = outputs if isinstance(outputs, tuple) else [outputs]
        for (child, i), gradient in zip(node.next_functions, outputs):
            if child and gradient is not None:
                form = child._input_metadata[i]
                assert gradient.device == form.device, f"{child} on {gradient.device}"
                gradient = gradient.sum_to_size(form.shape).to(form.dtype)
                gradients[child, i] = gradients.get((child, i), 0) + gradient
            edges[child] -= 1
            if child and not edges[child]:
                ready.append(child)


def in_loaders(loader):
    """data.in_loaders without pictures."""
    for draws in loader.batch_sampler:
        images = torch.zeros(len(draws), 3, 32, 32, dtype=torch.uint8)
        yield images, images[:, 0].short(), ["a path"]


@pytest.mark.skipif(not torch.__version__.startswith("2.14"), reason="uses internals of 2.14")
def test_a_step_on_a_gpu_mixes_no_devices_and_waits_twice(training, folder, monkeypatch):
    """Mixed devices raise, also in TPA, evaluation and the log around the step."""
    for name in ("images/val/1.jpg", "images/val/2.jpg", "masks/val/1.png", "masks/val/2.png"):
        (folder / name).unlink()
    waits, marks = Waits(), []  # how often it had waited before the step and after it
    for name, stub in {
            "torch.cuda.is_available": lambda: True,
            "torch.cuda.is_bf16_supported": lambda **options: True,
            "torch._C._current_graph_task_id": lambda: 0,  # for torch.utils.checkpoint
            "torch._subclasses.fake_tensor.FakeTensorMode.avoid_device_init": True,
            "torch._subclasses.fake_tensor.FakeTensorMode.__deepcopy__": lambda mode, memo: mode,
            "torch._subclasses.fake_tensor.FakeTensor.tolist":
                lambda x: waits.note(x.is_cuda) or [3.0] * len(x),  # of one dimension
            "torch.nn.Module.to": to, "torch.Tensor.backward": backward,
            "data.in_loaders": in_loaders,
            "support.accidents.start_processes": lambda: (0, 1, torch.device("cuda", 0)),
            "support.accidents.answer_signals": lambda handler: marks.append(len(waits.lines)),
            "support.accidents.anyone_asked_to_stop": lambda: marks.append(len(waits.lines)),
            "support.checkpoint.save": lambda *everything, **more: None,
            "evaluate.check_names": lambda *everything: None,
            "model.TINY": dict(embed_dim=16, vision_cfg=VISION, text_cfg=TEXT),
            "evaluate.examples": lambda *everything: None,
            "evaluate.confusion_matrix": lambda a, b, K: (a - b).new_zeros(K, K)}.items():
        monkeypatch.setattr(name, stub, raising=False)
    with FakeTensorMode(allow_non_fake_inputs=True), waits:
        training("run", "--steps=1", "--tpa-steps=1", "--image-size=32", "--batch-size=32",
                 "--precision=bf16")  # by hand also fp16, fp32 and --distill=pooled
    lines = waits.lines[marks[0]:marks[1]]
    assert len(lines) <= 3, f"two waits a step, one more when it is logged, not {lines}"
