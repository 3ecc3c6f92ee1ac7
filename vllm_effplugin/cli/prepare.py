"""`effplugin prepare TECHNIQUE MODEL OUT`: one command per technique."""

from __future__ import annotations

import typer

from vllm_effplugin.techniques.early_exit.command import early_exit
from vllm_effplugin.techniques.edge_cloud.command import edge_cloud
from vllm_effplugin.techniques.joint_exit.command import classify
from vllm_effplugin.techniques.layer_parallel.command import layer_parallel
from vllm_effplugin.techniques.multiplex.command import multiplex

app = typer.Typer(no_args_is_help=True, help="Make an efficient checkpoint from a stock one.")
app.command("layer-parallel")(layer_parallel)
app.command("early-exit")(early_exit)
app.command("edge-cloud")(edge_cloud)
app.command("classify")(classify)
app.command("multiplex")(multiplex)
