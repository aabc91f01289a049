"""What users install has lower bounds, and one bound each."""

from tests.oldest import oldest


def test_every_requirement_of_a_user_has_one_lower_bound() -> None:
    names = [one.split("==")[0] for one in oldest()]
    assert {"numpy", "array-api-compat", "torch", "diffusers", "transformers", "timm", "torchvision"} <= set(names)
    assert len(names) == len(set(names))


def test_numpy_has_the_functions_that_the_core_calls() -> None:
    assert "numpy==2.0" in oldest()  # vecdot came with it
