"""Mixtures of experts: the plug (`plug`), its layer (`layer`), who goes where (`routers`, `routing`), and how rows get
there (`exchange`, `grouped`)."""
