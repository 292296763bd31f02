"""What is said where a package is missing that the layers do without and training needs."""


def missing(error: ModuleNotFoundError) -> ModuleNotFoundError:
    """The error with what to install."""
    return ModuleNotFoundError(
        f"{error}: training and the commands need more than the layers do; in the checkout `pip install"
        " '.[train]'` or `pip install -r requirements.txt` installs it."
    )
