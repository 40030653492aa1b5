"""The two parents of a fusion, by what becomes of their channels."""

from clafusion import FusionResult, Parent


def identity_parent(result: FusionResult) -> Parent:
    """Return the parent that gives the target its structure and channels."""
    (found,) = (one for one in result.parents if one.is_identity)
    return found


def moved_parent(result: FusionResult) -> Parent:
    """Return the parent of two that is brought to the other one's structure and channels."""
    (found,) = (one for one in result.parents if not one.is_identity)
    return found
