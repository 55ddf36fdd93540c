"""Every 3x3 convolution of a model in one form of the family of factors, at the MACs of the filters' CPD at rank 1."""

from typing import Any

from torch import nn

from benchmarks.lib.rival_layers import chain, chain_macs, ranks_within
from norton_deploy.cost.complexity import layer_calls
from norton_deploy.method.plan import CompressionPlan, Coupling


def rank_one_plan(model: nn.Module, architecture: str, image_size: tuple[int, int], form: str) -> CompressionPlan:
    """The plan, for the model's own widths; nothing is pruned.

    Args:
        model: dense classifier or detector.
        architecture: of the plan.
        image_size: (height, width) that MACs are counted at.
        form: filter (the paper's), tucker, layer_cp or coupled N, where N is the number of clusters. Where a form has
            nothing so small, the layer gets the filters' CPD.

    Raises:
        UserError: not even rank 1 of the form fits into a layer's MACs.
    """
    sections: dict[str, Any] = {"ranks": {}, "tucker": {}, "layer_cp": {}, "coupled": {}}
    shapes = {call.name: call.shape for call in layer_calls(model, image_size)}
    for name, shape in shapes.items():
        layer = model.get_submodule(name)
        if not isinstance(layer, nn.Conv2d) or shape.kernel != (3, 3):
            continue
        (_, *map_in), output_size = shape.input_size, shape.output_size
        input_size = map_in[0], map_in[1]
        count, channels = shape.out_channels, shape.in_channels
        budget = chain_macs(chain("filter", count, channels, (1,)), shape.kernel, input_size, output_size)
        if form == "tucker":
            output_rank, input_rank = ranks_within("tucker2", layer.weight, budget, input_size, output_size)
            sections["tucker"][name] = input_rank, output_rank
        elif form == "layer_cp":
            (sections["layer_cp"][name],) = ranks_within("reshaped", layer.weight, budget, input_size, output_size)
        elif form.startswith("coupled"):
            clusters = int(form.split()[1])
            pixels_in, pixels_out = input_size[0] * input_size[1], output_size[0] * output_size[1]
            rank = budget // (clusters * channels * pixels_in + count * 9 * pixels_out)
            if rank:
                sections["coupled"][name] = Coupling(min(rank, channels), clusters)
            else:
                sections["ranks"][name] = 1
        else:
            sections["ranks"][name] = 1
    return CompressionPlan(architecture, **sections)
