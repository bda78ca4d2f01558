// Takes a plugin of the library through its life as TensorRT does: built from a node's attributes, asked for
// types, shapes and memory, serialised, made again from what was serialised, attached and run.
//
//   plugin_driver LIBRARY FOLDER OP iou_threshold=0.5 ... 2,300,4:float32 2,300:float32
//
// Fields are in the creator's order. Inputs come from FOLDER/0 and FOLDER/1, the result goes to FOLDER/output.
// What the plugin answers is printed, a name and its values a line. With -DNVIDIA_HEADERS it is built with
// NVIDIA's own headers, and so calls the library as TensorRT does. libcuda is the machine's, or a double.

#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <memory>
#include <sstream>
#include <string>
#include <vector>

#ifdef NVIDIA_HEADERS
#include <NvInferRuntime.h>
#else
#include "interface.h"
#endif

using namespace nvinfer1;

[[noreturn]] static void fail(const std::string& reason) {
  std::printf("failed %s\n", reason.c_str());
  std::exit(1);
}

static void expect(bool holds, const char* what) {
  if (!holds) fail(what);
}

// A side of a shape: its value is all that the builder of this double knows.
struct Side {
  int64_t value;
  static const IDimensionExpr* of(int64_t value) {
    return reinterpret_cast<const IDimensionExpr*>(new Side{value});  // for the life of the process
  }
  static int64_t value_of(const IDimensionExpr* side) { return reinterpret_cast<const Side*>(side)->value; }
};

struct Arithmetic final : apiv::VExprBuilder {
  const IDimensionExpr* constant(int64_t value) override { return Side::of(value); }
  const IDimensionExpr* operation(DimensionOperation op, const IDimensionExpr& a, const IDimensionExpr& b) override {
    expect(op == DimensionOperation::kPROD, "only products are known here");
    return Side::of(Side::value_of(&a) * Side::value_of(&b));
  }
#ifdef NVIDIA_HEADERS
  const IDimensionExpr* declareSizeTensor(int32_t, const IDimensionExpr&, const IDimensionExpr&) override {
    std::abort();
  }
#endif
};

struct Builder final : IExprBuilder {
  Builder() { mImpl = &arithmetic; }
  Arithmetic arithmetic;
};

struct Tensor {
  Dims dims{};
  DataType type{};

  static Tensor parse(const std::string& text) {  // 2,300,4:float32
    Tensor tensor;
    const size_t colon = text.find(':');
    std::istringstream sides(text.substr(0, colon));
    for (std::string side; std::getline(sides, side, ',');) tensor.dims.d[tensor.dims.nbDims++] = std::stoll(side);
    tensor.type = text.substr(colon + 1) == "float16" ? DataType::kHALF : DataType::kFLOAT;
    return tensor;
  }
  size_t bytes() const {
    size_t product = type == DataType::kHALF ? 2 : 4;
    for (int i = 0; i < dims.nbDims; ++i) product *= dims.d[i];
    return product;
  }
  PluginTensorDesc description() const { return {dims, type, TensorFormat::kLINEAR, 1.0f}; }
  DynamicPluginTensorDesc dynamic() const { return {description(), dims, dims, dims}; }
};

// Device memory by the driver's own functions.
struct Gpu {
  void* library = dlopen("libcuda.so.1", RTLD_NOW);
  void* stream = nullptr;

  template <typename... Arguments>
  void call(const char* name, Arguments... arguments) const {
    void* function = library ? dlsym(library, name) : nullptr;
    expect(function, name);
    const int code = reinterpret_cast<int (*)(Arguments...)>(function)(arguments...);
    if (code) fail(std::string(name) + " " + std::to_string(code));
  }
  Gpu() {
    int device = 0;
    void* context = nullptr;
    call("cuInit", 0u);
    call("cuDeviceGet", &device, 0);
    call("cuDevicePrimaryCtxRetain", &context, device);
    call("cuCtxSetCurrent", context);
    call("cuStreamCreate", &stream, 1u);
  }
  void* allocate(size_t size) const {
    void* address = nullptr;
    call("cuMemAlloc_v2", &address, size + 1);  // no block of nothing
    return address;
  }
};

static IPluginCreatorV3One* find_creator(const char* library, const char* op) {
  void* opened = dlopen(library, RTLD_NOW | RTLD_LOCAL);
  if (!opened) fail(dlerror());
  const auto creators = reinterpret_cast<IPluginCreatorInterface* const* (*)(int32_t&)>(dlsym(opened, "getCreators"));
  const auto set_logger = reinterpret_cast<void (*)(void*)>(dlsym(opened, "setLoggerFinder"));
  expect(creators && set_logger, "the library exports what a loader asks for");
  set_logger(nullptr);
  int32_t count = 0;
  IPluginCreatorInterface* const* all = creators(count);
  for (int i = 0; i < count; ++i) {
    expect(!std::strcmp(all[i]->getInterfaceInfo().kind, "PLUGIN CREATOR_V3ONE"), "creators are of version 3");
    auto* creator = static_cast<IPluginCreatorV3One*>(all[i]);
    if (!std::strcmp(creator->getPluginName(), op)) return creator;
  }
  fail("no creator of this name");
}

// The values behind fields, which nothing but the plugin owns once they are handed over.
struct Values {
  std::vector<std::string> names;
  std::vector<int32_t> words;
  std::vector<PluginField> fields;

  void add(const char* name, PluginFieldType type, const void* data) {
    names.push_back(name);
    words.push_back(0);
    std::memcpy(&words.back(), data, 4);
    fields.push_back({nullptr, nullptr, type, 1});
  }
  PluginFieldCollection collection() {
    for (size_t i = 0; i < fields.size(); ++i) fields[i].name = names[i].c_str(), fields[i].data = &words[i];
    return {static_cast<int32_t>(fields.size()), fields.data()};
  }
};

static Values parse_fields(IPluginCreatorV3One* creator, char** texts) {
  Values values;
  const PluginFieldCollection* known = creator->getFieldNames();
  for (int i = 0; i < known->nbFields; ++i) {
    const std::string text = texts[i];
    const size_t equals = text.find('=');
    const float number = std::stof(text.substr(equals + 1));
    const int32_t whole = static_cast<int32_t>(number);
    const bool is_float = known->fields[i].type == PluginFieldType::kFLOAT32;
    const void* data = is_float ? static_cast<const void*>(&number) : &whole;
    values.add(text.substr(0, equals).c_str(), known->fields[i].type, data);
  }
  return values;
}

// What is asked of a plugin while an engine is built; returns what the engine keeps of it, and its output.
static Values build(IPluginV3& plugin, const std::vector<Tensor>& inputs, Tensor& output, size_t& workspace) {
  auto* core = static_cast<IPluginV3OneCore*>(plugin.getCapabilityInterface(PluginCapabilityType::kCORE));
  auto* builder = static_cast<IPluginV3OneBuild*>(plugin.getCapabilityInterface(PluginCapabilityType::kBUILD));
  auto* runtime = static_cast<IPluginV3OneRuntime*>(plugin.getCapabilityInterface(PluginCapabilityType::kRUNTIME));
  expect(core && builder && runtime && builder->getNbOutputs() == 1, "all capabilities and one output");
  std::printf("plugin %s %s %s\n", core->getPluginNamespace(), core->getPluginName(), core->getPluginVersion());

  std::vector<DataType> types;
  std::vector<DimsExprs> shapes(inputs.size());
  for (size_t i = 0; i < inputs.size(); ++i) {
    types.push_back(inputs[i].type);
    shapes[i].nbDims = inputs[i].dims.nbDims;
    for (int axis = 0; axis < shapes[i].nbDims; ++axis) shapes[i].d[axis] = Side::of(inputs[i].dims.d[axis]);
  }
  Builder expressions;
  DimsExprs shape{};
  const int count = static_cast<int>(inputs.size());
  expect(!builder->getOutputDataTypes(&output.type, 1, types.data(), count), "getOutputDataTypes");
  expect(!builder->getOutputShapes(shapes.data(), count, nullptr, 0, &shape, 1, expressions), "getOutputShapes");
  output.dims.nbDims = shape.nbDims;
  std::printf("output");
  for (int axis = 0; axis < shape.nbDims; ++axis) {
    output.dims.d[axis] = Side::value_of(shape.d[axis]);
    std::printf(" %lld", static_cast<long long>(output.dims.d[axis]));
  }
  std::printf("\n");

  std::vector<DynamicPluginTensorDesc> tensors;
  for (const Tensor& input : inputs) tensors.push_back(input.dynamic());
  tensors.push_back(output.dynamic());
  std::printf("supports");
  for (int position = 0; position <= count; ++position)  // itself, the other float, another layout
    for (int variant = 0; variant < 3; ++variant) {
      auto asked = tensors;
      PluginTensorDesc& one = asked[position].desc;
      if (variant == 1) one.type = one.type == DataType::kHALF ? DataType::kFLOAT : DataType::kHALF;
      if (variant == 2) one.format = static_cast<TensorFormat>(1);
      std::printf(" %d", builder->supportsFormatCombination(position, asked.data(), count, 1));
    }
  std::printf("\n");
  expect(!builder->configurePlugin(tensors.data(), count, &tensors[count], 1), "configurePlugin");
  workspace = builder->getWorkspaceSize(tensors.data(), count, &tensors[count], 1);
  std::printf("workspace %zu\nserialised", workspace);
  Values kept;
  const PluginFieldCollection* fields = runtime->getFieldsToSerialize();
  for (int i = 0; i < fields->nbFields; ++i) {
    const PluginField& field = fields->fields[i];
    expect(field.length == 1, "fields of one value");
    kept.add(field.name, field.type, field.data);
    std::printf(" %s:%d:%d", field.name, static_cast<int>(field.type), kept.words.back());
  }
  std::printf("\n");
  return kept;
}

static std::string read(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

static void execute(IPluginV3& plugin, const std::vector<Tensor>& inputs, const Tensor& output, size_t workspace,
                    const std::string& folder) {
  auto* runtime = static_cast<IPluginV3OneRuntime*>(plugin.getCapabilityInterface(PluginCapabilityType::kRUNTIME));
  const Gpu gpu;
  const std::unique_ptr<IPluginV3> attached(runtime->attachToContext(nullptr));
  if (!attached) fail("attachToContext");
  runtime = static_cast<IPluginV3OneRuntime*>(attached->getCapabilityInterface(PluginCapabilityType::kRUNTIME));
  std::vector<PluginTensorDesc> descriptions;
  std::vector<const void*> addresses;
  for (size_t i = 0; i < inputs.size(); ++i) {
    const std::string content = read(folder + "/" + std::to_string(i));
    expect(content.size() == inputs[i].bytes(), "inputs of their sizes");
    void* address = gpu.allocate(content.size());
    gpu.call("cuMemcpyHtoD_v2", address, static_cast<const void*>(content.data()), content.size());
    descriptions.push_back(inputs[i].description());
    addresses.push_back(address);
  }
  const PluginTensorDesc result = output.description();
  const int count = static_cast<int>(inputs.size());
  expect(!runtime->onShapeChange(descriptions.data(), count, &result, 1), "onShapeChange");
  void* target = gpu.allocate(output.bytes());
  void* scratch = workspace ? gpu.allocate(workspace) : nullptr;
  if (runtime->enqueue(descriptions.data(), &result, addresses.data(), &target, scratch,
                       static_cast<cudaStream_t>(gpu.stream)))
    fail("enqueue");
  gpu.call("cuStreamSynchronize", gpu.stream);
  std::string content(output.bytes(), '\0');
  gpu.call("cuMemcpyDtoH_v2", static_cast<void*>(content.data()), static_cast<const void*>(target), content.size());
  std::ofstream(folder + "/output", std::ios::binary) << content;
}

int main(int count, char** texts) {
  if (count < 8) fail("usage: plugin_driver LIBRARY FOLDER OP FIELD=VALUE FIELD=VALUE SHAPE:TYPE SHAPE:TYPE");
  IPluginCreatorV3One* creator = find_creator(texts[1], texts[3]);
  Values given = parse_fields(creator, texts + 4);
  const std::vector<Tensor> inputs = {Tensor::parse(texts[6]), Tensor::parse(texts[7])};
  const PluginFieldCollection attributes = given.collection();
  std::unique_ptr<IPluginV3> building(creator->createPlugin("node", &attributes, TensorRTPhase::kBUILD));
  if (!building) fail("createPlugin");
  Tensor output;
  size_t workspace = 0;
  const std::unique_ptr<IPluginV3> cloned(building->clone());
  building.reset();  // a clone stands on its own
  Values kept = build(*cloned, inputs, output, workspace);
  const PluginFieldCollection fields = kept.collection();
  std::unique_ptr<IPluginV3> loaded(creator->createPlugin("node", &fields, TensorRTPhase::kRUNTIME));
  if (!loaded) fail("createPlugin of what was serialised");
  kept = {};  // TensorRT's memory of them is gone as well
  execute(*loaded, inputs, output, workspace, texts[2]);
  std::printf("done\n");
}
