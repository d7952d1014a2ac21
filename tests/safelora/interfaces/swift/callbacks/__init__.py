from .mapping import callbacks_map as callbacks_map
