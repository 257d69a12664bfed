"""The web page: a pure part, which knows what a request means, and a thin one, which shows it by Gradio."""
