// TensorRT 11's libraries for tests: just enough for NVIDIA's real Python bindings to import, and for every call
// of our builder and runtime to go through them. It builds no engine: each object answers what its network of one
// plugin layer would. As in TensorRT, ROIAlign_TRT is there once initLibNvInferPlugins was called and not before.
//
// The interfaces are written down as far as they are called, by the places of their virtual functions
// (NvInferImpl.h, NvInferPluginBase.h, NvOnnxParser.h, which promise not to move them); what has no body here
// returns 0. The stub_ functions at the end are for the test, which calls them through ctypes.
#include <dlfcn.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>

namespace {

struct Dims {
  int32_t count;
  int64_t sides[8];
};
struct Field {
  const char* name;
  const void* data;
  int32_t type, length;
};
struct Fields {
  int32_t count;
  const Field* fields;
};
struct TensorDesc {
  Dims dims;
  int32_t type, format;
  float scale;
};
struct Info {
  const char* kind;
  int32_t major, minor;
};

// What Python's side implements: real virtual calls.
struct Versioned {
  virtual int32_t language() const = 0;
  virtual Info info() const = 0;
  virtual ~Versioned() {}
};
struct Logger : Versioned {
  virtual void log(int32_t severity, const char* text) = 0;
};
struct Monitor : Versioned {
  virtual void phase_start(const char* phase, const char* parent, int32_t steps) = 0;
  virtual bool step_complete(const char* phase, int32_t step) = 0;
  virtual void phase_finish(const char* phase) = 0;
};
struct Plugin : Versioned {
  virtual Versioned* capability(int32_t kind) = 0;
  virtual Plugin* clone() = 0;
};
struct PluginRuntime : Versioned {
  virtual int32_t set_tactic(int32_t tactic) = 0;
  virtual int32_t on_shape_change(const TensorDesc* in, int32_t ins, const TensorDesc* out, int32_t outs) = 0;
  virtual int32_t enqueue(const TensorDesc* in, const TensorDesc* out, const void* const* inputs,
                          void* const* outputs, void* workspace, void* stream) = 0;
  virtual Plugin* attach_to_context(void* context) = 0;
  virtual const Fields* fields_to_serialize() = 0;
};
struct Creator : Versioned {
  virtual Plugin* create(const char* node, const Fields* fields, int32_t phase) = 0;
  virtual const Fields* field_names() = 0;
  virtual const char* name() = 0;
  virtual const char* version() = 0;
  virtual const char* space() = 0;
};

Logger* logger;
Creator* creators[8];
int creator_count, initialised;
bool roi_align, host_code, plugin_in_plan;

bool refuse(const char* reason) {
  logger->log(1, reason);
  return false;
}

struct Registry {
  virtual ~Registry() {}
  virtual void set_error_recorder(void*) {}
  virtual void* error_recorder() { return nullptr; }
  virtual bool parent_search() { return true; }
  virtual void set_parent_search(bool) {}
  virtual void* load_library(const char* path) {  // of plugins in C++
    void* library = dlopen(path, RTLD_NOW);
    void* exported = library ? dlsym(library, "getCreators") : nullptr;
    if (!exported) return nullptr;
    int32_t count = 0;
    Creator* const* all = reinterpret_cast<Creator* const* (*)(int32_t&)>(exported)(count);
    for (int i = 0; i < count; ++i) {
      if (!register_creator(*all[i], all[i]->space())) return nullptr;
    }
    return library;
  }
  virtual void deregister_library(void*) {}
  virtual bool register_creator(Creator& creator, const char* space) {
    for (int i = 0; i < creator_count; ++i) {
      if (!strcmp(creators[i]->name(), creator.name()) && !strcmp(creators[i]->space(), space)) return false;
    }
    creators[creator_count++] = &creator;
    return true;
  }
  virtual Creator* const* all_creators(int32_t* count) { return *count = creator_count, creators; }
  virtual Creator* creator(const char* name, const char* version, const char* space) {
    for (int i = 0; i < creator_count; ++i) {
      const bool named = !strcmp(creators[i]->name(), name) && !strcmp(creators[i]->version(), version);
      if (named && !strcmp(creators[i]->space(), space)) return creators[i];
    }
    return nullptr;
  }
} registry;

// An object as the bindings hold it, and behind it a table of functions by their places.
typedef void (*Function)();
struct Table {
  Function* functions;
  Function places[96];
  Table() : functions(places) {
    for (Function& place : places) place = reinterpret_cast<Function>(+[]() -> uint64_t { return 0; });
  }
  template <typename F>
  Table& at(int place, F function) {
    places[place] = reinterpret_cast<Function>(function);
    return *this;
  }
};
struct Object {
  explicit Object(Table& table) : table(&table) {}
  virtual ~Object() {}
  Table* table;
};
template <int number>  // a table of its own, filled when it is first wanted
Table& table() {
  static Table made;
  return made;
}

const char* const NAMES[] = {"images", "image_sizes", "boxes", "scores", "labels", "num_detections"};
const int32_t TYPES[] = {5, 0, 0, 0, 3, 3};  // kUINT8, kFLOAT, kINT32
const Dims SHAPES[] = {{4, {-1, 48, 64, 3}}, {2, {-1, 2}}, {3, {-1, 3, 4}}, {2, {-1, 3}}, {2, {-1, 3}}, {1, {-1}}};
int index_of(const char* name) {
  for (int i = 0; i < 6; ++i) {
    if (!strcmp(name, NAMES[i])) return i;
  }
  abort();
}

Object* memory() {
  return new Object(table<0>()
                        .at(2, +[](void*) { return static_cast<const void*>("a plan of the stub"); })
                        .at(3, +[](void*) { return static_cast<size_t>(18); })
                        .at(4, +[](void*) { return 2; }));  // kINT8
}

// Builder.

Object* tensors[2];
const char* names_used[] = {"nvinfer_vc_plugin"};
char serialized_plugins[64], timings[64];
Monitor* monitor;
uint32_t flags;
int32_t level, profiles, bound[2][3];  // the batches of each input's profile
size_t workspace;

Table& tensor_table(int index) {
  Table& made = index ? table<1>() : table<2>();
  made.at(3, index ? +[](void*) { return NAMES[1]; } : +[](void*) { return NAMES[0]; });
  made.at(4, +[](void*, const Dims&) {});
  made.at(5, index ? +[](void*) { return SHAPES[1]; } : +[](void*) { return SHAPES[0]; });
  return made;
}

Object* network() {
  for (int i = 0; i < 2; ++i) tensors[i] = new Object(tensor_table(i));
  static Object* layer = new Object(table<3>()
                                        .at(2, +[](void*) { return 46; })  // kPLUGIN_V3
                                        .at(4, +[](void*) { return "nms"; })
                                        .at(7, +[](void*) { return 1; })
                                        .at(8, +[](void*, int32_t) { return tensors[1]; }));
  return new Object(table<4>()
                        .at(12, +[](void*) { return 1; })
                        .at(13, +[](void*, int32_t) { return layer; })
                        .at(14, +[](void*) { return 2; })
                        .at(15, +[](void*, int32_t index) { return tensors[index]; }));
}

Object* profile() {
  return new Object(table<5>()
                        .at(2, +[](void*, const char* name, int32_t which, const Dims& dims) {
                          bound[index_of(name)][which] = static_cast<int32_t>(dims.sides[0]);
                          return dims.count == SHAPES[index_of(name)].count;
                        })
                        .at(4, +[](void*, const char*) { return -1; })
                        .at(7, +[](void*) { return true; }));
}

Object* timing_cache() { return new Object(table<6>().at(2, +[](void*) { return memory(); })); }

Object* config() {
  return new Object(
      table<7>()
          .at(6, +[](void*, uint32_t given) { flags = given; })
          .at(7, +[](void*) { return flags; })
          .at(9, +[](void*, int32_t flag) { flags |= 1u << flag; })
          .at(10, +[](void*, int32_t flag) { return (flags >> flag & 1) != 0; })
          .at(23, +[](void*, Object* given) { return given ? profiles++ : -1; })
          .at(29, +[](void*, const void* blob, size_t size) {
            memcpy(timings, blob, size < sizeof timings ? size : sizeof timings);
            return timing_cache();
          })
          .at(30, +[](void*, const Object&, bool) { return strcmp(timings, "of another version") != 0; })
          .at(31, +[](void*) { return timing_cache(); })
          .at(32, +[](void*, int32_t pool, size_t size) { workspace = pool == 0 ? size : 0; })
          .at(36, +[](void*, int32_t given) { level = given; })
          .at(40, +[](void*, const char* const* paths, int32_t count) {
            if (count == 1) strncpy(serialized_plugins, paths[0], sizeof serialized_plugins - 1);
          })
          .at(45, +[](void*, Monitor* given) { monitor = given; }));
}

Object* build() {
  if (flags & 1u << 12 && strcmp(serialized_plugins, names_used[0])) {  // VERSION_COMPATIBLE
    refuse("the plugin library nvinfer_vc_plugin is used and not among those to serialize");
    return nullptr;
  }
  monitor->phase_start("Building", nullptr, 2);
  const bool go_on = monitor->step_complete("Building", 0) && monitor->step_complete("Building", 1);
  monitor->phase_finish("Building");
  return go_on ? memory() : nullptr;
}

// ONNX parser.

struct ParserError {
  virtual int32_t code() { return 8; }
  virtual const char* text() { return "Plugin not found, are the plugin name, version, and namespace correct?"; }
  virtual const char* file() { return "importerUtils.cpp"; }
  virtual int line() { return 1; }
  virtual const char* function() { return "getPluginCreator"; }
  virtual int node() { return 0; }
  virtual const char* node_name() { return ""; }
  virtual const char* node_operator() { return "RoiAlign"; }
  virtual const char* const* stack() { return names_used; }
  virtual int32_t stack_size() { return 1; }
} parser_error;

struct Parser {
  virtual bool parse(const void*, size_t, const char*) {
    return roi_align || refuse("Plugin not found: ROIAlign_TRT, version 2");
  }
  virtual bool parse_file(const char*, int) { return false; }
  virtual bool supports_operator(const char*) { return false; }
  virtual int errors() { return roi_align ? 0 : 1; }
  virtual ParserError* error(int) { return &parser_error; }
  virtual void clear_errors() {}
  virtual ~Parser() {}
  virtual const char* const* plugin_libraries(int64_t& count) { return count = 1, names_used; }
};

// Runtime.

struct Context {
  void* device_memory;
  int64_t device_memory_size, batch, addresses, runs;
} context;

Object* execution_context() {
  return new Object(
      table<8>()
          .at(20, +[](void*, const char* name, const Dims& dims) {
            if (index_of(name) == 0) context.batch = dims.sides[0];
            return dims.sides[0] <= 8 || refuse("setInputShape: not in the profile");
          })
          .at(23, +[](void*, const char* name, void* data) {
            context.addresses += index_of(name) >= 0 && reinterpret_cast<uintptr_t>(data) % 256 == 0;
            return true;
          })
          .at(36, +[](void*, void* stream) { return stream ? ++context.runs > 0 : refuse("enqueueV3: no stream"); })
          .at(48, +[](void*, void* memory, int64_t size) {
            context.device_memory = memory;
            context.device_memory_size = size;
          }));
}

Object* deserialize(void*, const void* blob, size_t size) {
  if (size != 18 || memcmp(blob, "a plan of the stub", size)) return refuse("magicTag failed"), nullptr;
  if (!roi_align) return refuse("Cannot find plugin: ROIAlign_TRT, version: 2"), nullptr;
  if (plugin_in_plan && !creator_count) return refuse("Cannot find plugin: BatchedNMS, version: 1"), nullptr;
  return new Object(
      table<9>()
          .at(5, +[](void*, int32_t strategy) { return strategy == 2 ? execution_context() : nullptr; })
          .at(15, +[](void*, const char* name) { return SHAPES[index_of(name)]; })
          .at(16, +[](void*, const char* name) { return TYPES[index_of(name)]; })
          .at(19, +[](void*, const char* name) { return index_of(name) < 2 ? 1 : 2; })
          .at(25, +[](void*, const char* name, int32_t, int32_t which) {
            Dims dims = SHAPES[index_of(name)];
            dims.sides[0] = which == 2 ? 8 : which == 1 ? 4 : 1;
            return dims;
          })
          .at(26, +[](void*) { return 6; })
          .at(27, +[](void*, int32_t index) { return NAMES[index]; })
          .at(44, +[](void*) { return static_cast<int64_t>(4096); }));
}

}  // namespace

extern "C" {

void* createInferBuilder_INTERNAL(void* given, int32_t) {
  logger = static_cast<Logger*>(given);
  return new Object(table<10>()
                        .at(5, +[](void*) { return config(); })
                        .at(6, +[](void*, uint32_t) { return network(); })
                        .at(7, +[](void*) { return profile(); })
                        .at(11, +[](void*, Object&, Object&) { return build(); }));
}
void* createInferRuntime_INTERNAL(void* given, int32_t) {
  logger = static_cast<Logger*>(given);
  return new Object(table<11>().at(3, deserialize).at(20, +[](void*, bool allowed) { host_code = allowed; }));
}
void* createInferRefitter_INTERNAL(void*, void*, int32_t) { return nullptr; }
void* createNvOnnxParser_INTERNAL(void*, void*, int32_t) { return new Parser; }
void* createNvOnnxParserRefitter_INTERNAL(void*, void*, int32_t) { return nullptr; }
int32_t getNvOnnxParserVersion() { return 0; }
void* getBuilderPluginRegistry(int32_t) { return &registry; }
void* getPluginRegistry() { return &registry; }
bool initLibNvInferPlugins(void*, const char* space) {
  ++initialised;
  return roi_align = !*space;
}

// For the test.

Context* stub_context() { return &context; }
const int32_t* stub_profile() { return bound[0]; }
int stub_initialised() { return initialised; }
bool stub_host_code() { return host_code; }
uint64_t stub_config(int what) { return what == 0 ? flags : what == 1 ? level : workspace; }

Plugin* stub_plugin(int creator, const Fields* fields, int32_t phase) {
  return creators[creator]->create("node", fields, phase);
}
int stub_creators() { return creator_count; }
int stub_add_creator(Creator* creator) { return creators[creator_count] = creator, creator_count++; }
const Fields* stub_fields(Plugin* plugin) {
  return static_cast<PluginRuntime*>(plugin->capability(2))->fields_to_serialize();
}
Plugin* stub_attach(Plugin* plugin) {
  return static_cast<PluginRuntime*>(plugin->capability(2))->attach_to_context(nullptr);
}
int32_t stub_enqueue(Plugin* plugin, int64_t groups, int64_t boxes) {
  const TensorDesc inputs[] = {{{3, {groups, boxes, 4}}, 0, 0, 1.0f}, {{2, {groups, boxes}}, 0, 0, 1.0f}};
  auto* runtime = static_cast<PluginRuntime*>(plugin->capability(2));
  runtime->on_shape_change(inputs, 2, inputs + 1, 1);
  const void* from[] = {reinterpret_cast<void*>(256), reinterpret_cast<void*>(512)};
  void* to[] = {reinterpret_cast<void*>(1024)};
  return runtime->enqueue(inputs, inputs + 1, from, to, nullptr, reinterpret_cast<void*>(7));
}
}
