// A libcuda.so.1 for tests: it runs nothing and writes every call as a line of JSON to the file METIS_RECORD. The bytes of a
// kernel's arguments are read by the sizes that the kernel itself states, in the .nv.info section of its cubin.
//
// METIS_RECORD_CONTEXT: number of the context that is current, 0 for none until cuCtxSetCurrent.
// METIS_RECORD_FAIL: name of a function that returns error 209.

#include <elf.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { ERROR = 209, MAX_PARAMS = 64 };

struct function {
  char name[256];
  int num_params;
  int sizes[MAX_PARAMS];
};

static __thread uintptr_t current; // context set by cuCtxSetCurrent

static void write_line(const char *line) {
  FILE *file = fopen(getenv("METIS_RECORD"), "a"); // one write a line, so that threads do not mix
  fputs(line, file);
  fclose(file);
}

#define RECORD(...)                                \
  do {                                             \
    char line_[4096];                              \
    snprintf(line_, sizeof line_, __VA_ARGS__);    \
    write_line(line_);                             \
  } while (0)

static int fails(const char *name) {
  const char *wanted = getenv("METIS_RECORD_FAIL");
  return wanted && !strcmp(wanted, name) ? ERROR : 0;
}

int cuGetErrorString(int error, const char **text) {
  *text = error == ERROR ? "no kernel image is available for execution on the device" : NULL;
  return *text ? 0 : 1;
}

int cuDeviceGet(int *device, int ordinal) {
  *device = ordinal;
  return fails("cuDeviceGet");
}

int cuDevicePrimaryCtxRetain(void **context, int device) {
  RECORD("{\"call\": \"cuDevicePrimaryCtxRetain\", \"device\": %d}\n", device);
  *context = (void *)(uintptr_t)(100 + device);
  return fails("cuDevicePrimaryCtxRetain");
}

int cuCtxGetCurrent(void **context) {
  const char *number = getenv("METIS_RECORD_CONTEXT");
  *context = (void *)(current ? current : number ? (uintptr_t)atoi(number) : 1);
  return fails("cuCtxGetCurrent");
}

int cuCtxSetCurrent(void *context) {
  RECORD("{\"call\": \"cuCtxSetCurrent\", \"context\": %d}\n", (int)(uintptr_t)context);
  current = (uintptr_t)context;
  return fails("cuCtxSetCurrent");
}

// End of the last section, or of the tables: the length of the file that was embedded.
static size_t elf_bytes(const unsigned char *image) {
  const Elf64_Ehdr *header = (const Elf64_Ehdr *)image;
  const Elf64_Shdr *sections = (const Elf64_Shdr *)(image + header->e_shoff);
  size_t end = header->e_shoff + (size_t)header->e_shnum * header->e_shentsize;
  size_t programs_end = header->e_phoff + (size_t)header->e_phnum * header->e_phentsize;
  if (programs_end > end) end = programs_end;
  for (int i = 0; i < header->e_shnum; i++)
    if (sections[i].sh_type != SHT_NOBITS && sections[i].sh_offset + sections[i].sh_size > end)
      end = sections[i].sh_offset + sections[i].sh_size;
  return end;
}

int cuModuleLoadData(void **module, const void *image) {
  if (fails("cuModuleLoadData")) return ERROR;
  size_t bytes = elf_bytes(image);
  uint64_t hash = 14695981039346656037u; // FNV-1a
  for (size_t i = 0; i < bytes; i++) hash = (hash ^ ((const unsigned char *)image)[i]) * 1099511628211u;
  RECORD("{\"call\": \"cuModuleLoadData\", \"bytes\": %zu, \"hash\": %llu}\n", bytes, (unsigned long long)hash);
  usleep(20000); // a real one takes this long too: two threads that both load would meet here
  *module = (void *)image;
  return 0;
}

int cuModuleGetFunction(void **function, void *module, const char *name) {
  if (fails("cuModuleGetFunction")) return ERROR;
  const unsigned char *image = module;
  const Elf64_Ehdr *header = (const Elf64_Ehdr *)image;
  const Elf64_Shdr *sections = (const Elf64_Shdr *)(image + header->e_shoff);
  const char *names = (const char *)image + sections[header->e_shstrndx].sh_offset;
  char wanted[300];
  snprintf(wanted, sizeof wanted, ".nv.info.%s", name);
  const Elf64_Shdr *info = NULL;
  for (int i = 0; i < header->e_shnum; i++)
    if (!strcmp(names + sections[i].sh_name, wanted)) info = &sections[i];
  if (!info) return 500; // CUDA_ERROR_NOT_FOUND
  struct function *made = calloc(1, sizeof *made);
  snprintf(made->name, sizeof made->name, "%s", name);
  // attributes: format, name, then two bytes of value, or (format 4) the length of the value that follows
  const unsigned char *at = image + info->sh_offset, *end = at + info->sh_size;
  while (at < end) {
    uint16_t length;
    memcpy(&length, at + 2, 2);
    if (at[0] == 4 && at[1] == 0x17) { // EIATTR_KPARAM_INFO: index, ordinal, offset, flags with the size above bit 18
      uint16_t ordinal;
      uint32_t flags;
      memcpy(&ordinal, at + 8, 2);
      memcpy(&flags, at + 12, 4);
      made->sizes[ordinal] = (int)(flags >> 18);
      if (ordinal >= made->num_params) made->num_params = ordinal + 1;
    }
    at += at[0] == 4 ? 4 + length : 4;
  }
  RECORD("{\"call\": \"cuModuleGetFunction\", \"name\": \"%s\"}\n", name);
  *function = made;
  return 0;
}

int cuFuncSetCacheConfig(struct function *function, int config) {
  RECORD("{\"call\": \"cuFuncSetCacheConfig\", \"name\": \"%s\", \"config\": %d}\n", function->name, config);
  return fails("cuFuncSetCacheConfig");
}

int cuFuncSetAttribute(struct function *function, int attribute, int value) {
  RECORD("{\"call\": \"cuFuncSetAttribute\", \"name\": \"%s\", \"attribute\": %d, \"value\": %d}\n", function->name, attribute,
         value);
  return fails("cuFuncSetAttribute");
}

int cuLaunchKernel(struct function *function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                   unsigned block_y, unsigned block_z, unsigned shared, void *stream, void **params, void **extra) {
  if (fails("cuLaunchKernel")) return ERROR;
  char arguments[2048] = "";
  size_t used = 0;
  for (int i = 0; i < function->num_params; i++) {
    used += snprintf(arguments + used, sizeof arguments - used, i ? ", \"" : "\"");
    for (int byte = 0; byte < function->sizes[i]; byte++)
      used += snprintf(arguments + used, sizeof arguments - used, "%02x", ((unsigned char *)params[i])[byte]);
    used += snprintf(arguments + used, sizeof arguments - used, "\"");
  }
  RECORD("{\"call\": \"cuLaunchKernel\", \"name\": \"%s\", \"grid\": [%u, %u, %u], \"block\": [%u, %u, %u], \"shared\": %u, "
         "\"stream\": %llu, \"extra\": %d, \"arguments\": [%s]}\n",
         function->name, grid_x, grid_y, grid_z, block_x, block_y, block_z, shared, (unsigned long long)(uintptr_t)stream,
         extra != NULL, arguments);
  return 0;
}
