// Takes the place of the theme's script of the same name: its style sheet and font already draw every icon.
