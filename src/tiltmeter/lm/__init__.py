"""All that knows tokens: chat data, models, their losses and products, and measured safety."""
