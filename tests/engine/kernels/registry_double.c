// TensorRT's registry as a library that registers itself on loading meets it: an object whose function at PLACE,
// as NVIDIA's headers have it (interface_layout.cpp), is registerCreator. Any other ends the process.
#include <stdio.h>
#include <stdlib.h>

static int add(void *registry, void *creator, const char *name_space) {
  return printf("registered in %s by %d\n", name_space, VERSION), registry && creator;
}
static void other(void) { abort(); }

void *getPluginRegistry(void) {
  static void *table[16], *registry[] = {table};
  for (int i = 0; i < 16; ++i) table[i] = i == PLACE ? (void *)add : (void *)other;
  return setvbuf(stdout, NULL, _IONBF, 0), registry;
}
