// The custom ops as TensorRT plugins for programs without Python: anchorline::BatchedNMS and
// anchorline::RoIPool, as anchorline/runtime/tensorrt/plugins.py has them. Names, versions, fields and kernels
// are the same, so an engine built with either is loaded by either.
//
// An op is a plain struct that knows its output's shape, its scratch memory and its kernels; Plugin and
// Creator make a TensorRT plugin of any of them. Nothing here is linked against TensorRT or CUDA.

#include <algorithm>
#include <cstring>
#include <new>

#include "interface.h"
#include "kernels.h"

namespace anchorline {

using namespace nvinfer1;

constexpr const char *NAMESPACE = "anchorline", *VERSION = "1";

// An attribute of a node: a float32 or an int32, at `offset` in the op.
struct Attribute {
  const char* name;
  PluginFieldType type;
  size_t offset;
};

// boxes [G, N, 4] xyxy and scores [G, N] in falling order, float32 -> scores [G, N], suppressed ones -1.
// N is at most 8192, iou_threshold 0 to 1.
struct BatchedNMS {
  float iou_threshold, score_threshold;

  static constexpr const char *name = "BatchedNMS", *source = "nms";
  static constexpr const char* kernels[] = {"nms_overlaps", "nms_select", "nms_small"};
  static constexpr int output_like = 1;  // the input whose type the output has
  static constexpr int64_t MAX_BOXES = 8192;  // the words of bits that nms_select keeps in shared memory
  static constexpr int64_t MAX_GROUPS = 65535;  // a grid's third side
  static constexpr int64_t TILE = 64, SMALL = 256;  // NMS_TILE and NMS_SMALL of the kernels

  static const Attribute* attributes() {
    static const Attribute all[] = {
        {"iou_threshold", PluginFieldType::kFLOAT32, offsetof(BatchedNMS, iou_threshold)},
        {"score_threshold", PluginFieldType::kFLOAT32, offsetof(BatchedNMS, score_threshold)}};
    return all;
  }

  bool check() const {
    if (iou_threshold >= 0.0f && iou_threshold <= 1.0f) return true;
    return report("BatchedNMS: iou_threshold is %g; expected 0 to 1", iou_threshold), false;
  }

  // Whether the tensor at `position` of inputs and output may have its type.
  static bool accepts(int position, const DynamicPluginTensorDesc* tensors) {
    return tensors[position].desc.type == DataType::kFLOAT;
  }

  bool output_shape(const DimsExprs* inputs, DimsExprs& output, IExprBuilder&) const {
    if (inputs[0].nbDims != 3 || inputs[1].nbDims != 2) return false;
    output = inputs[1];
    return true;
  }

  // Whether the kernels take so many.
  static bool fits(const Dims& scores) {
    const int64_t groups = scores.d[0], boxes = scores.d[1];
    if (boxes <= MAX_BOXES && groups <= MAX_GROUPS) return true;
    report("BatchedNMS: %lld groups of %lld boxes; the plugin takes at most %lld of %lld: export with fewer "
           "proposals, or build for smaller batches", static_cast<long long>(groups),
           static_cast<long long>(boxes), static_cast<long long>(MAX_GROUPS), static_cast<long long>(MAX_BOXES));
    return false;
  }

  // The overlap matrix on and above its diagonal, in tiles of 64x64 bits.
  static size_t workspace_bytes(const Dims& scores) {
    const int64_t words = words_of(scores.d[1]);
    return scores.d[1] <= SMALL ? 0 : scores.d[0] * words * (words + 1) / 2 * TILE * sizeof(uint64_t);
  }

  bool launch(const PluginTensorDesc* tensors, const void* const* inputs, void* kept, void* tiles,
              cudaStream_t stream) const {
    if (!fits(tensors[1].dims)) return false;
    const int64_t groups = tensors[1].dims.d[0], boxes = tensors[1].dims.d[1], words = words_of(boxes);
    if (groups == 0 || boxes == 0) return true;
    Kernels& gpu = Kernels::of_process();
    const int count = static_cast<int>(boxes);
    const unsigned side = static_cast<unsigned>(words), blocks = static_cast<unsigned>(groups);
    if (boxes <= SMALL)
      return gpu.launch(source, "nms_small", {blocks, 1, 1}, side * TILE, stream, inputs[0], inputs[1], kept,
                        count, iou_threshold, score_threshold);
    const unsigned threads = std::min(1024u, 32 * std::max(2u, side));
    return gpu.launch(source, "nms_overlaps", {side + 1, (side + 1) / 2, blocks}, TILE, stream, inputs[0],
                      inputs[1], tiles, count, iou_threshold, score_threshold) &&
           gpu.launch(source, "nms_select", {blocks, 1, 1}, threads, stream, inputs[0], inputs[1], tiles, kept,
                      count, score_threshold);
  }

 private:
  static int64_t words_of(int64_t boxes) { return (boxes + TILE - 1) / TILE; }
};

// features [B, C, H, W] float32 or float16 and rois [B, R, 4] xyxy float32, in image pixels ->
// [B * R, C, S, S]. output_size is S; spatial_scale takes image pixels to feature pixels.
struct RoIPool {
  int32_t output_size;
  float spatial_scale;

  static constexpr const char *name = "RoIPool", *source = "roi_pool";
  static constexpr const char* kernels[] = {"roi_pool_f32", "roi_pool_f16"};
  static constexpr int output_like = 0;
  static constexpr int64_t THREADS = 256;

  static const Attribute* attributes() {
    static const Attribute all[] = {{"output_size", PluginFieldType::kINT32, offsetof(RoIPool, output_size)},
                                    {"spatial_scale", PluginFieldType::kFLOAT32, offsetof(RoIPool, spatial_scale)}};
    return all;
  }

  bool check() const {
    if (output_size >= 1 && spatial_scale > 0.0f) return true;
    report("RoIPool: output_size is %d and spatial_scale %g; expected at least 1 and above 0", output_size,
           spatial_scale);
    return false;
  }

  static bool accepts(int position, const DynamicPluginTensorDesc* tensors) {
    const DataType type = tensors[position].desc.type;
    if (position == 0) return type == DataType::kFLOAT || type == DataType::kHALF;
    return type == (position == 1 ? DataType::kFLOAT : tensors[0].desc.type);
  }

  bool output_shape(const DimsExprs* inputs, DimsExprs& output, IExprBuilder& builder) const {
    if (inputs[0].nbDims != 4 || inputs[1].nbDims != 3) return false;
    const DimsExprs& boxes = inputs[1];
    const IDimensionExpr* rois = builder.operation(DimensionOperation::kPROD, *boxes.d[0], *boxes.d[1]);
    const IDimensionExpr* side = builder.constant(output_size);
    output = {4, {rois, inputs[0].d[1], side, side}};
    return true;
  }

  static bool fits(const Dims&) { return true; }
  static size_t workspace_bytes(const Dims&) { return 0; }

  bool launch(const PluginTensorDesc* tensors, const void* const* inputs, void* pooled, void*,
              cudaStream_t stream) const {
    const int64_t* map = tensors[0].dims.d;  // B, C, H, W
    const int64_t* rois = tensors[1].dims.d;  // B, R, 4
    const long long total = rois[0] * rois[1] * map[1] * output_size * output_size;
    if (total == 0) return true;
    const unsigned blocks = static_cast<unsigned>((total + THREADS - 1) / THREADS);
    const bool half = tensors[0].type == DataType::kHALF;
    return Kernels::of_process().launch(source, kernels[half], {blocks, 1, 1}, THREADS, stream, inputs[0],
                                        inputs[1], pooled, static_cast<int>(rois[1]), static_cast<int>(map[1]),
                                        static_cast<int>(map[2]), static_cast<int>(map[3]), output_size,
                                        spatial_scale, total);
  }
};

// The attributes of an op as TensorRT takes them: both ops have two. `op` is null where only names matter.
template <typename Op>
struct Fields {
  PluginField all[2];
  PluginFieldCollection collection{2, all};

  explicit Fields(const Op* op) {
    for (int i = 0; i < 2; ++i) {
      const Attribute& attribute = Op::attributes()[i];
      const char* value = op ? reinterpret_cast<const char*>(op) + attribute.offset : nullptr;
      all[i] = {attribute.name, value, attribute.type, op ? 1 : 0};
    }
  }
};

// The plugin of one node; `loaded` from an engine, or to build one.
template <typename Op>
class Plugin final : public IPluginV3,
                     public IPluginV3OneCore,
                     public IPluginV3OneBuild,
                     public IPluginV3OneRuntime {
 public:
  Plugin(const Op& op, bool loaded) : op_(op), loaded_(loaded), fields_(&op_) {}

  IPluginCapability* getCapabilityInterface(PluginCapabilityType type) noexcept override {
    switch (type) {
      case PluginCapabilityType::kCORE: return static_cast<IPluginV3OneCore*>(this);
      case PluginCapabilityType::kBUILD: return static_cast<IPluginV3OneBuild*>(this);
      case PluginCapabilityType::kRUNTIME: return static_cast<IPluginV3OneRuntime*>(this);
    }
    return nullptr;
  }

  IPluginV3* clone() noexcept override { return new (std::nothrow) Plugin(op_, loaded_); }

  const char* getPluginName() const noexcept override { return Op::name; }
  const char* getPluginVersion() const noexcept override { return VERSION; }
  const char* getPluginNamespace() const noexcept override { return NAMESPACE; }

  int32_t getNbOutputs() const noexcept override { return 1; }

  int32_t getOutputDataTypes(DataType* outputs, int32_t, const DataType* inputs,
                             int32_t count) const noexcept override {
    if (count != 2) return report("%s has %d inputs; expected 2", Op::name, count), 1;
    outputs[0] = inputs[Op::output_like];
    return 0;
  }

  int32_t getOutputShapes(const DimsExprs* inputs, int32_t count, const DimsExprs*, int32_t, DimsExprs* outputs,
                          int32_t, IExprBuilder& builder) noexcept override {
    if (count == 2 && op_.output_shape(inputs, outputs[0], builder)) return 0;
    return report("%s: its inputs have the wrong number of axes; export the model again", Op::name), 1;
  }

  bool supportsFormatCombination(int32_t position, const DynamicPluginTensorDesc* tensors, int32_t,
                                 int32_t) noexcept override {
    return tensors[position].desc.format == TensorFormat::kLINEAR && Op::accepts(position, tensors);
  }

  int32_t configurePlugin(const DynamicPluginTensorDesc* inputs, int32_t, const DynamicPluginTensorDesc*,
                          int32_t) noexcept override {
    return Op::fits(inputs[1].max) ? 0 : 1;
  }

  size_t getWorkspaceSize(const DynamicPluginTensorDesc* inputs, int32_t, const DynamicPluginTensorDesc*,
                          int32_t) const noexcept override {
    return Op::workspace_bytes(inputs[1].max);
  }

  int32_t onShapeChange(const PluginTensorDesc*, int32_t, const PluginTensorDesc*, int32_t) noexcept override {
    return 0;
  }

  // Null tells TensorRT that the context cannot be made.
  IPluginV3* attachToContext(IPluginResourceContext*) noexcept override {
    for (const char* kernel : Op::kernels)
      if (loaded_ && !Kernels::of_process().preload(Op::source, kernel)) return nullptr;
    return clone();
  }

  int32_t enqueue(const PluginTensorDesc* tensors, const PluginTensorDesc*, const void* const* inputs,
                  void* const* outputs, void* workspace, cudaStream_t stream) noexcept override {
    return op_.launch(tensors, inputs, outputs[0], workspace, stream) ? 0 : 1;
  }

  const PluginFieldCollection* getFieldsToSerialize() noexcept override { return &fields_.collection; }

 private:
  Op op_;
  bool loaded_;
  Fields<Op> fields_;  // with the addresses of what is in `op_`
};

// Makes the plugin of a node from its attributes, or from what an engine holds of them.
template <typename Op>
class Creator final : public IPluginCreatorV3One {
 public:
  const char* getPluginName() const noexcept override { return Op::name; }
  const char* getPluginVersion() const noexcept override { return VERSION; }
  const char* getPluginNamespace() const noexcept override { return NAMESPACE; }
  const PluginFieldCollection* getFieldNames() noexcept override { return &names_.collection; }

  IPluginV3* createPlugin(const char* node, const PluginFieldCollection* given,
                          TensorRTPhase phase) noexcept override {
    Op op{};
    for (int i = 0; i < 2; ++i) {
      const Attribute& wanted = Op::attributes()[i];
      const auto is_wanted = [&](const PluginField& field) {
        return field.name && !std::strcmp(field.name, wanted.name);
      };
      const PluginField* end = given->fields + given->nbFields;
      const PluginField* found = std::find_if(given->fields, end, is_wanted);
      if (found == end || found->type != wanted.type || found->length != 1 || !found->data) {
        report("%s: node %s has no attribute %s of one value; export the model again", Op::name, node, wanted.name);
        return nullptr;
      }
      std::memcpy(reinterpret_cast<char*>(&op) + wanted.offset, found->data, 4);
    }
    if (!op.check()) return nullptr;
    return new (std::nothrow) Plugin<Op>(op, phase == TensorRTPhase::kRUNTIME);
  }

 private:
  Fields<Op> names_{nullptr};
};

static IPluginCreatorInterface* const* creators(int32_t& count) {
  // Never destroyed: TensorRT's registry has them until the process ends.
  static IPluginCreatorInterface* const all[] = {new Creator<BatchedNMS>, new Creator<RoIPool>};
  count = 2;
  return all;
}

}  // namespace anchorline

#define EXPORT extern "C" __attribute__((visibility("default")))

// What TensorRT asks a library for that it is told to load (loadLibrary, trtexec --dynamicPlugins).
EXPORT nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& count) { return anchorline::creators(count); }
EXPORT void setLoggerFinder(void*) {}

#ifdef REGISTER_ON_LOAD
// For programs that only open the library (Triton): the plugins go into TensorRT's registry by themselves.
// TensorRT need not be among what the program shows to all its libraries, so it is asked for by name. Where
// registerCreator stands among the registry's virtual functions differs between its two versions.
static const bool registered_on_load = [] {
  constexpr struct {
    const char* library;
    int place;
  } versions[] = {{"libnvinfer.so.10", 12}, {"libnvinfer.so.11", 8}};
  bool registered = false;
  for (const auto& version : versions) {  // both may be: onnxruntime brings its own
    void* tensorrt = dlopen(version.library, RTLD_NOW | RTLD_NOLOAD);
    void* function = tensorrt ? dlsym(tensorrt, "getPluginRegistry") : nullptr;
    if (!function) continue;
    using Register = bool (*)(void* registry, nvinfer1::IPluginCreatorInterface*, const char* name_space);
    void* registry = reinterpret_cast<void* (*)()>(function)();
    const Register add = (*static_cast<Register**>(registry))[version.place];
    int32_t count = 0;
    nvinfer1::IPluginCreatorInterface* const* creators = anchorline::creators(count);
    for (int i = 0; i < count; ++i)
      if (!add(registry, creators[i], anchorline::NAMESPACE))
        anchorline::report("another plugin of this name is registered in this process; load only one");
    registered = true;
  }
  if (!registered) anchorline::report("TensorRT 10 or 11 is not loaded, so nothing was registered");
  return registered;
}();
#endif
