"""A page that shows the model thinking, drawing, looking and drawing again (Gradio)."""


def page(api, app):
  """Adds the page to the API."""
  return app
