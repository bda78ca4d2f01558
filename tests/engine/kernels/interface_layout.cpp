// Prints what a plugin and TensorRT have to agree on: where each virtual function stands in its table, sizes and
// places in structs, numbers of enumerators, names and versions of interfaces. Built once with our interface.h
// and once, with -DNVIDIA_HEADERS, with NVIDIA's headers; the outputs must be equal.

#include <cstdio>
#include <cstring>

#ifdef NVIDIA_HEADERS
#include <NvInferRuntime.h>
#else
#include "interface.h"
#endif

using namespace nvinfer1;

// Itanium ABI: a pointer to a virtual function holds its offset in the table, on x86-64 plus 1.
template <typename Function>
long place(Function function) {
  long parts[2];
  static_assert(sizeof parts == sizeof function, "two words");
  std::memcpy(parts, &function, sizeof parts);
  return (parts[0] & ~1L) / static_cast<long>(sizeof(void*));
}

struct Builder : IExprBuilder {
  static size_t implementation() { return offsetof(Builder, mImpl); }
};

#define PLACE(function) std::printf(#function " %ld\n", place(&function));
#define SIZE(type) std::printf("sizeof " #type " %zu\n", sizeof(type));
#define MEMBER(type, member) std::printf(#type "." #member " %zu\n", offsetof(type, member));
#define VALUE(enumerator) std::printf(#enumerator " %d\n", static_cast<int>(enumerator));

template <typename Interface>
struct Kind : Interface {  // abstract: only its own answer is asked for, without an object
  static void print(const char* name) {
    alignas(Interface) static char nothing[sizeof(Interface)];
    const InterfaceInfo info = reinterpret_cast<Kind*>(nothing)->Interface::getInterfaceInfo();
    std::printf("%s: %s %d.%d\n", name, info.kind, info.major, info.minor);
  }
};
#define KIND(interface) Kind<interface>::print(#interface);

int main() {
  PLACE(IVersionedInterface::getAPILanguage)
  PLACE(IVersionedInterface::getInterfaceInfo)
  PLACE(IPluginV3::getCapabilityInterface)
  PLACE(IPluginV3::clone)
  PLACE(IPluginV3OneCore::getPluginName)
  PLACE(IPluginV3OneCore::getPluginVersion)
  PLACE(IPluginV3OneCore::getPluginNamespace)
  PLACE(IPluginV3OneBuild::configurePlugin)
  PLACE(IPluginV3OneBuild::getOutputDataTypes)
  PLACE(IPluginV3OneBuild::getOutputShapes)
  PLACE(IPluginV3OneBuild::supportsFormatCombination)
  PLACE(IPluginV3OneBuild::getNbOutputs)
  PLACE(IPluginV3OneBuild::getWorkspaceSize)
  PLACE(IPluginV3OneBuild::getValidTactics)
  PLACE(IPluginV3OneBuild::getNbTactics)
  PLACE(IPluginV3OneBuild::getTimingCacheID)
  PLACE(IPluginV3OneBuild::getFormatCombinationLimit)
  PLACE(IPluginV3OneBuild::getMetadataString)
  PLACE(IPluginV3OneRuntime::setTactic)
  PLACE(IPluginV3OneRuntime::onShapeChange)
  PLACE(IPluginV3OneRuntime::enqueue)
  PLACE(IPluginV3OneRuntime::attachToContext)
  PLACE(IPluginV3OneRuntime::getFieldsToSerialize)
  PLACE(IPluginCreatorV3One::createPlugin)
  PLACE(IPluginCreatorV3One::getFieldNames)
  PLACE(IPluginCreatorV3One::getPluginName)
  PLACE(IPluginCreatorV3One::getPluginVersion)
  PLACE(IPluginCreatorV3One::getPluginNamespace)
  PLACE(apiv::VExprBuilder::constant)
  PLACE(apiv::VExprBuilder::operation)
  std::printf("IExprBuilder.mImpl %zu\n", Builder::implementation());

  SIZE(IPluginV3) SIZE(IPluginV3OneCore) SIZE(IPluginV3OneBuild) SIZE(IPluginV3OneRuntime) SIZE(IPluginCreatorV3One)
  SIZE(Dims) MEMBER(Dims, nbDims) MEMBER(Dims, d) VALUE(Dims::MAX_DIMS)
  SIZE(DimsExprs) MEMBER(DimsExprs, nbDims) MEMBER(DimsExprs, d)
  SIZE(PluginTensorDesc) MEMBER(PluginTensorDesc, dims) MEMBER(PluginTensorDesc, type)
  MEMBER(PluginTensorDesc, format) MEMBER(PluginTensorDesc, scale)
  SIZE(DynamicPluginTensorDesc) MEMBER(DynamicPluginTensorDesc, desc) MEMBER(DynamicPluginTensorDesc, min)
  MEMBER(DynamicPluginTensorDesc, max) MEMBER(DynamicPluginTensorDesc, opt)
  SIZE(PluginField) MEMBER(PluginField, name) MEMBER(PluginField, data) MEMBER(PluginField, type)
  MEMBER(PluginField, length)
  SIZE(PluginFieldCollection) MEMBER(PluginFieldCollection, nbFields) MEMBER(PluginFieldCollection, fields)
  SIZE(InterfaceInfo) MEMBER(InterfaceInfo, kind) MEMBER(InterfaceInfo, major) MEMBER(InterfaceInfo, minor)

  SIZE(APILanguage) SIZE(DataType) SIZE(TensorFormat) SIZE(DimensionOperation) SIZE(PluginFieldType)
  SIZE(TensorRTPhase) SIZE(PluginCapabilityType)
  VALUE(APILanguage::kCPP) VALUE(DataType::kFLOAT) VALUE(DataType::kHALF) VALUE(TensorFormat::kLINEAR)
  VALUE(DimensionOperation::kPROD) VALUE(PluginFieldType::kFLOAT32) VALUE(PluginFieldType::kINT32)
  VALUE(TensorRTPhase::kBUILD) VALUE(TensorRTPhase::kRUNTIME) VALUE(PluginCapabilityType::kCORE)
  VALUE(PluginCapabilityType::kBUILD) VALUE(PluginCapabilityType::kRUNTIME)

  KIND(IPluginV3) KIND(IPluginV3OneCore) KIND(IPluginV3OneBuild) KIND(IPluginV3OneRuntime) KIND(IPluginCreatorV3One)

#ifdef NVIDIA_HEADERS
  using Register = bool (IPluginRegistry::*)(IPluginCreatorInterface&, const char*);
  std::fprintf(stderr, "TensorRT %d: registerCreator %ld\n", static_cast<int>(NV_TENSORRT_MAJOR),
               place(static_cast<Register>(&IPluginRegistry::registerCreator)));
#endif
}
