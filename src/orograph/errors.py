"""Everything that Orograph raises on its own account.

    Exception
    ├── OrographError
    │   ├── NotDeterministic     the loss is not one fixed function: data or model change between readings
    │   ├── NotDifferentiable    no second derivative can be had from this model
    │   ├── PreflightFailed      the operator disagrees with finite differences
    │   │   └── ProductWrong         the gradient is right, and the product is not what its differences say
    │   │       └── CriterionWrong       the network's part is right, and the criterion's second derivative is not
    │   ├── OutOfBudget          the memory allowed does not suffice
    │   └── RecordError          a folder of records is damaged or of an unknown schema
    ├── ValueError, TypeError    bad arguments
    └── (whatever the user's model or criterion raises passes unchanged, with a note)

`OrographWarning` is the category of every warning.
"""


class OrographError(Exception):
    """Base of Orograph's own errors."""


class NotDeterministic(OrographError):
    """The loss is not one fixed function of the weights."""


class NotDifferentiable(OrographError):
    """The model has no second derivative that autograd can compute."""


class PreflightFailed(OrographError):
    """The operator disagrees with finite differences of the same loss."""


class ProductWrong(PreflightFailed):
    """The gradient is right, and the product is not what its differences say."""


class CriterionWrong(ProductWrong):
    """The criterion's gradient is right, and its second derivative in the outputs is not what differences of it say."""


class OutOfBudget(OrographError):
    """The job needs more memory than it was allowed."""


class RecordError(OrographError):
    """A store of records cannot be read."""


class OrographWarning(UserWarning):
    """Category of Orograph's warnings."""
