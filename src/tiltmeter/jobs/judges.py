"""The judge that a user named."""

from __future__ import annotations

from typing import Literal, cast

from tiltmeter.errors import InputError
from tiltmeter.lm.classifier import load_classifier
from tiltmeter.lm.judging import Judge, RuleJudge
from tiltmeter.lm.strongreject import KEY_VARIABLE, EndpointJudge, Limits


def judge_of(
    name: str,
    *,
    model: str | None = None,
    key_variable: str | None = None,
    requests: int = Limits.requests,
    tokens: int = Limits.tokens,
    timeout: float = Limits.timeout,
    label: str | None = None,
    means: str | None = None,
) -> Judge:
    """The judge a user named: "rules", the address of an endpoint, or a classifier.

    Args:
        name: "rules", an address such as https://host/v1, or a classifier's id or folder.
        model: name of the judge model at the address.
        key_variable: environment variable with its key.
        requests: most requests to the address.
        tokens: most tokens there.
        timeout: seconds for one request.
        label: label of the classifier to read.
        means: what that label means, "refusal" or "harm".

    Raises: InputError: what this kind of judge needs is missing, or means is unknown. ModelError: no such classifier.
    """
    if name == "rules":
        return RuleJudge()
    if "://" in name:
        if not model:
            raise InputError("a judge at an address needs --judge-model, the name of the judge model there")
        return EndpointJudge(name, model, key_variable or KEY_VARIABLE, Limits(requests, tokens, timeout))
    if means not in (None, "refusal", "harm"):
        raise InputError(f"--judge-means must be refusal or harm, got {means!r}")
    return load_classifier(name, label=label, means=cast("Literal['refusal', 'harm'] | None", means))
