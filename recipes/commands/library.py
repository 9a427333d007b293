"""`mmdit recipes`: list, show, validate, schema. No torch."""

from __future__ import annotations

from typing import Annotated

import typer

from recipes.commands import console
from recipes.commands.read import Format

app = typer.Typer(help="The recipes: list, show, validate, schema.", no_args_is_help=True)
Sets = Annotated[list[str] | None, typer.Option("--set", help="key=value, for example steps=50 or sampler.seed=7.")]


@app.command("list")
def list_recipes(format: Format = "text") -> None:
    """The recipes that can be run by name: built in, and of installed packages."""
    from probe.errors import MmditError
    from recipes.language import include, parse, registry
    from recipes.language.meaning import needs

    rows = []
    for one in include.listed():
        try:
            recipe = parse.load(str(one.path))
        except MmditError as error:
            console.error(str(error))
            continue
        rows.append(
            {
                "name": one.name,
                "description": recipe.description,
                "status": recipe.status or "",
                "source": recipe.source,
                "needs": list(needs(recipe)),
                "from": one.origin,
            }
        )
    for pack in registry.packs():
        if pack.problem:
            console.error(pack.problem)
    console.entries(rows, format)


@app.command()
def show(recipe: str) -> None:
    """Print a recipe's YAML, a starting point for your own."""
    from recipes.language import include

    console.text(include.text_of(include.find(recipe)).rstrip())


@app.command()
def validate(
    recipes: Annotated[list[str], typer.Argument(help="Built-in names or YAML files.")], sets: Sets = None
) -> None:
    """Check recipes without loading a model."""
    from recipes.language import parse

    for recipe in recipes:
        console.text(f"{recipe} is a valid recipe: {parse.load(recipe, sets or ()).name}.")


@app.command()
def schema() -> None:
    """Print the JSON schema of recipes, for editors."""
    from recipes.language.recipe import Recipe

    console.data(Recipe.model_json_schema())
