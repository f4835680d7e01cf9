"""Run records and what is made of them: HTML, terminal, Markdown, annotations, SARIF, history and gates."""
