"""A copy of an attention call to try edits on: what they do to it does not reach the model."""

from __future__ import annotations

from dataclasses import replace

from probe.call import AttentionCall


def shadow(call: AttentionCall) -> AttentionCall:
    """The call as it stands, with its edits and changes so far, and no output yet. Tensors are shared until an edit
    writes; `own` stays what the model made.
    """
    copy = replace(call, out=None, changes=list(call.changes), later=[])
    copy.own = dict(call.own)
    return copy
